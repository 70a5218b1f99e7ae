"""What stands between the network and the page: request checks, headers, log-in, uploads, the private folder."""

"""What the app and the server over HTTP share."""

"""Files: our own format, packs, plain LoRAs for other tools, and theirs."""

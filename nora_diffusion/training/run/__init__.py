"""One run: encode data, build, train, save and report."""

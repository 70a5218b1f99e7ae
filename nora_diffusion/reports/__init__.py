"""Reports as one HTML page, plots as SVG, contact sheets."""

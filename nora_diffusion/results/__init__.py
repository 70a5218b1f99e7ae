"""Results that others can check and submit: one JSON file for each benchmark, and the leaderboard of many files."""

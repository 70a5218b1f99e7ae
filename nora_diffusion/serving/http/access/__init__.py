"""Who may ask for how much: keys and rates."""

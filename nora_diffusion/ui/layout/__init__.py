"""What every tab shares: shell, theme, cards."""

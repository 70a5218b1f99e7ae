"""What is settled before a run's first step: its plan, its folder, what it resumes from, what speaks against it."""

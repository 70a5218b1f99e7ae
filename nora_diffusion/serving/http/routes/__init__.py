"""The routes of the server: its own API, those of OpenAI and A1111, subjects, and what operators read."""

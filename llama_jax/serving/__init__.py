"""Serving: requests that join and leave a running batch; an OpenAI-compatible HTTP server; a chat page."""

"""An OpenAI-compatible server with a joule budget on every request: `eopc serve`, behind the extra `serve`."""

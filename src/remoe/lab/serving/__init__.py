"""`remoe serve`: a model behind OpenAI's API, by transformers' own server."""

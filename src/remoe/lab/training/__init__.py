"""Training of a language model: `config` holds the options, `train` runs them, `folder` shows what a run leaves."""

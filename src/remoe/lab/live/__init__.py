"""A page that follows a run while it trains, served on this machine alone."""

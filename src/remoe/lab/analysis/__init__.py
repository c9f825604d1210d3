"""What the experts of a trained model do: routing collected, measured and drawn."""

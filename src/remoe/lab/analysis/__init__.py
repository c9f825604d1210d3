"""What the experts of a trained model do: collecting, measuring and plotting its routing."""

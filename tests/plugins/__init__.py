"""What the two test tiers share with pytest itself."""

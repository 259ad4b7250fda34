"""A stopped process and our programs: that nothing of us stays, whatever happens to whom."""

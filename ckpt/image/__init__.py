"""The image format: reading, writing and checking chains; touches no live process."""

"""Everything that depends on the processor, one module per architecture."""

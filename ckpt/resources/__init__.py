"""One file per kernel object, holding its record, its capture and its restore side by side."""

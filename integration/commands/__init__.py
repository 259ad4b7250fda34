"""What commands make for people and their tools: pages, completions, logs, figures."""

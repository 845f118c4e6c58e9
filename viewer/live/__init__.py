"""What needs the language model: traces, steering, ablation, attribution."""

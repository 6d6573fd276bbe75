"""Zero-shot evaluation of image–text models: classification with prompt templates, and retrieval in both directions."""

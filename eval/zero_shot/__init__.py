"""Image-text models judged without training on the task: classification by prompts, retrieval in both directions."""

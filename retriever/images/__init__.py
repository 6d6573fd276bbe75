"""Images beside texts: transforms, image towers, and pairs of an image and its captions."""

"""Image towers: loading them, transforms of images, patch dropout."""

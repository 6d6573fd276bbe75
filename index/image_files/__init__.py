"""Image files: in folders, in tars and in tables, with classes and prompts."""

from index.image_files.folders import IMAGES, ImageAt, StoredImage, images_in, list_image_folder, read_image_file

__all__ = ["IMAGES", "ImageAt", "StoredImage", "images_in", "list_image_folder", "read_image_file"]

"""Read image files, folders and archives; augment images."""

"""Small images that need no download, and small networks that take any norm and activation layer."""

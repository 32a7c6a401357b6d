"""The publisher: TUF metadata and blobs as plain files that any static host can serve."""

"""The predecessor's bundles and manifest: import and export."""

"""Files and figures: run folders, datasets on disk, one module per figure."""

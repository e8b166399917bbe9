"""Images, masks and class lists: generated scenes, folders on disk, augmentation, and a loader that can resume."""

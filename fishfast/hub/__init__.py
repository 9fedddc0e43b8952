"""Models as users keep them: a configuration, model folders, batches of text."""

"""Models, tasks and batches put together for the data sets that `mmfast.data` installs."""

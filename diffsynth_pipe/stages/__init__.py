"""The stages as plain functions: data_process, train, plan."""

"""The Prefect flow over the stages."""

"""What a study found, as tables, plots and pages."""

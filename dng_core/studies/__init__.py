"""The study of class removal: what is drawn, how settings are chosen, what is measured, and the report."""

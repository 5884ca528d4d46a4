"""What results say: runs compared, figures explained, and pages made."""

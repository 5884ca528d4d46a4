"""How the reference policy is made: a scripted expert, demonstrations of it, and the training."""

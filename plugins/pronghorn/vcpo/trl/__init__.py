"""VCPO for TRL: trainers, their configurations, and a callback for other trainers."""

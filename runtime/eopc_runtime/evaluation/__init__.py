"""Evaluation: what tiers are worth on texts and on multiple-choice questions, through the runtime that ships."""

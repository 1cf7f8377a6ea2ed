"""The report: one page of HTML about a bundle, for a person to look at, with nothing fetched from anywhere."""

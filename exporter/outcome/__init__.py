"""What a build or an export found out: as values, as files of the folder, and in words."""

"""What a run is, as frozen data; YAML in, resolved YAML out, every mistake at once."""

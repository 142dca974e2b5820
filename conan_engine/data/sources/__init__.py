"""Where text comes from: installed documentation, message catalogues, the user's own files."""

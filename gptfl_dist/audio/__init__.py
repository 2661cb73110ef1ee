"""Sound: clips from files and into them (`clip`), and the log-mel spectrograms that models see (`spectrogram`)."""

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// restoreCommandFor is the restore_command that fetches a cluster's WAL with this binary. The server runs it with its own
// environment and working directory, so it names everything outright, the key too. With overlay, a data directory, its daemon is asked
// first: that has the repository open, and may have the right to.
func restoreCommandFor(c *cli.Context, repoURL, cluster, overlay string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	keys, err := keyArgs(c)
	if err != nil {
		return "", err
	}
	words := slices.Concat([]string{self, "--repo", repoURL}, keys, []string{"wal", "fetch"})
	if overlay != "" {
		dir, err := filepath.Abs(overlay)
		if err != nil {
			return "", err
		}
		words = append(words, "--overlay", dir)
	}
	words = append(words, cluster)
	for i, w := range words {
		words[i] = strings.ReplaceAll(shellQuote(w), "%", "%%")
	}
	return strings.Join(words, " ") + ` "%f" "%p"`, nil
}

// shellQuote writes a word so that sh reads it back, quoted only where it must be.
func shellQuote(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=@+,"
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

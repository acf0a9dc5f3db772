package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"
	"go.yaml.in/yaml/v3"
)

// applyConfig fills in, from the file that --config names, what neither a flag nor the environment has set. Its keys are
// the names of the flags that have an environment variable. It runs before the command's own flags are read, so that a
// value put there as a default yields to both.
func applyConfig(c *cli.Context) error {
	path := c.String("config")
	if path == "" {
		return nil
	}
	keys, err := readConfig(path)
	if err != nil {
		return err
	}
	known := settings(c.App)
	for i := 0; i+1 < len(keys); i += 2 {
		key, value := keys[i], keys[i+1]
		flags := known[key.Value]
		if flags == nil {
			return usage("%s:%d: unknown key %q", path, key.Line, key.Value)
		}
		if value.Kind != yaml.ScalarNode {
			return usage("%s:%d: %s must be a single value", path, value.Line, key.Value)
		}
		for _, f := range flags {
			if err := setDefault(c, f, value.Value); err != nil {
				return usage("%s:%d: %s: %v", path, value.Line, key.Value, err)
			}
		}
	}
	return nil
}

// readConfig returns the file's keys and values, in turn.
func readConfig(path string) ([]*yaml.Node, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	var doc yaml.Node
	switch err := yaml.NewDecoder(f).Decode(&doc); {
	case errors.Is(err, io.EOF): // nothing but comments
		return nil, nil
	case err != nil:
		return nil, usage("%s: %v", path, err)
	}
	if top := doc.Content[0]; top.Kind == yaml.MappingNode {
		return top.Content, uniqueKeys(path, top.Content)
	}
	return nil, usage("%s: not a list of keys and values", path)
}

func uniqueKeys(path string, keys []*yaml.Node) error {
	seen := map[string]bool{}
	for i := 0; i < len(keys); i += 2 {
		if seen[keys[i].Value] {
			return usage("%s:%d: %s is set twice", path, keys[i].Line, keys[i].Value)
		}
		seen[keys[i].Value] = true
	}
	return nil
}

// settings are the flags that have an environment variable, by name. The file named by --config cannot name another.
func settings(app *cli.App) map[string][]cli.Flag {
	all := map[string][]cli.Flag{}
	add := func(flags []cli.Flag) {
		for _, f := range flags {
			d, ok := f.(cli.DocGenerationFlag)
			if name := f.Names()[0]; ok && len(d.GetEnvVars()) > 0 && name != "config" {
				all[name] = append(all[name], f)
			}
		}
	}
	add(app.Flags)
	forEachCommand(app, func(_ string, c *cli.Command) { add(c.Flags) })
	return all
}

// setDefault gives one flag a value unless it was set already.
func setDefault(c *cli.Context, f cli.Flag, value string) (err error) {
	name := f.Names()[0]
	if findFlag(c.App.Flags, name) != nil { // a global flag has been read by now
		if c.IsSet(name) {
			return nil
		}
		return c.Set(name, value)
	}
	switch f := f.(type) {
	case *cli.StringFlag:
		f.Value = value
	case *cli.IntFlag:
		if f.Value, err = strconv.Atoi(value); err != nil {
			err = errors.New("must be a whole number")
		}
	case *cli.DurationFlag:
		if f.Value, err = time.ParseDuration(value); err != nil {
			err = errors.New("must be a time such as 90s or 5m")
		}
	case *cli.BoolFlag:
		if f.Value, err = strconv.ParseBool(value); err != nil {
			err = errors.New("must be true or false")
		}
	default:
		panic(fmt.Sprintf("flag --%s has no kind that a file can set", name))
	}
	return err
}

package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"
)

const lineEvery = 10 * time.Second

// progress tells on stderr how far a command is: a bar on a terminal, otherwise a line now and then.
// Safe for concurrent use.
type progress struct {
	w       io.Writer
	bar     bool // w is a terminal
	objects bool // what is counted; else bytes
	now     func() time.Time

	mu     sync.Mutex // held while writing to w, which orders the output
	shown  *progressbar.ProgressBar
	phase  string
	began  time.Time // of the phase
	before int64     // done when the phase was first heard of
	last   time.Time // a line was printed, or the phase began
}

func newProgress(c *cli.Context) *progress {
	f, ok := c.App.ErrWriter.(*os.File)
	bar := ok && term.IsTerminal(int(f.Fd())) && !c.Bool("json")
	return &progress{w: c.App.ErrWriter, bar: bar, now: time.Now}
}

// update takes bytes, or objects, done of total in a phase of the work. A total of 0 is not known.
func (p *progress) update(phase string, done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.phase != phase {
		p.begin(phase, done, total)
	}
	if p.bar {
		if total > 0 && total != p.shown.GetMax64() {
			p.shown.ChangeMax64(total)
		}
		_ = p.shown.Set64(min(done, max(total, done)))
		return
	}
	if now := p.now(); now.Sub(p.last) >= lineEvery {
		p.last = now
		fmt.Fprintln(p.w, p.line(phase, done, total, done-p.before, now.Sub(p.began)))
	}
}

// begin opens a phase. Caller holds mu.
func (p *progress) begin(phase string, done, total int64) {
	p.clear()
	p.phase, p.began, p.before = phase, p.now(), done
	p.last = p.began
	if !p.bar {
		return
	}
	if total == 0 {
		total = -1
	}
	p.shown = progressbar.NewOptions64(total, progressbar.OptionSetWriter(p.w), progressbar.OptionSetDescription(phase),
		progressbar.OptionShowBytes(!p.objects), progressbar.OptionUseIECUnits(true), progressbar.OptionShowCount(),
		progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(), progressbar.OptionFullWidth())
}

// done takes the bar away, so that what is printed next stands on a clean line.
func (p *progress) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}

// clear removes the bar. Caller holds mu.
func (p *progress) clear() {
	if p.shown != nil {
		_ = p.shown.Clear()
		p.shown = nil
	}
	p.phase = ""
}

// line writes "backup: 1.2 GB of 3.4 GB, 312 MB/s, 7 s left". moved is what was done within took.
func (p *progress) line(phase string, done, total, moved int64, took time.Duration) string {
	amount := size
	if p.objects {
		amount = func(n int64) string { return strconv.FormatInt(n, 10) }
	}
	line := fmt.Sprintf("%s: %s", phase, amount(done))
	if total > 0 {
		line += " of " + amount(total)
	}
	if moved <= 0 || took <= 0 {
		return line
	}
	rate := float64(moved) / took.Seconds()
	line += fmt.Sprintf(", %s/s", amount(int64(rate)))
	if total > done {
		left := time.Duration(float64(total-done) / rate * float64(time.Second))
		line += fmt.Sprintf(", %s left", duration(left.Round(time.Second)))
	}
	return line
}

package recovery

import (
	"sync"
	"time"
)

// paceWindow is how far back a pace looks.
const paceWindow = 30 * time.Second

// pace is how fast the daemon fills the directory.
type pace struct {
	mu    sync.Mutex
	marks []paceMark // within the window, oldest first
}

// paceMark says how much was filled up to a time, in bytes.
type paceMark struct {
	at   time.Time
	done int64
}

// note takes in how much is filled by now.
func (p *pace) note(now time.Time, done int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.marks) > 1 && now.Sub(p.marks[1].at) >= paceWindow {
		p.marks = p.marks[1:]
	}
	p.marks = append(p.marks, paceMark{now, done})
}

// perSecond is how many bytes were filled a second; 0: none, or it is not known yet.
func (p *pace) perSecond() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.marks) < 2 {
		return 0
	}
	first, last := p.marks[0], p.marks[len(p.marks)-1]
	return int64(float64(last.done-first.done) / last.at.Sub(first.at).Seconds())
}

// left is how long bytes take at a pace; 0 if there is none.
func left(bytes, perSecond int64) time.Duration {
	if perSecond <= 0 {
		return 0
	}
	return time.Duration(float64(bytes) / float64(perSecond) * float64(time.Second))
}

// Sums of neighbours: of each run of `period` elements the sums of `pieces` pieces of {{ each }}, `lanes` invocations each. An invocation adds up
// at most {{ (each + lanes - 1) // lanes }} elements, in blocks of {{ block }}.
{# Inside: the task is at most the last one, and elements read lie below the end of its piece, all of x. y has an element for each task, and
   what follows the last up to its stride. #}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let task = min(wanted, {{ tasks - 1 }}u);
    let first = task / {{ pieces }}u * {{ period }}u;
    let piece = task % {{ pieces }}u;
    let end = first + min((piece + 1u) * {{ each }}u, {{ period }}u);
    var sum = 0.0;
    for (var begin = first + piece * {{ each }}u + lid % {{ lanes }}u; begin < end; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, end);
        var part = 0.0;
        for (var i = begin; i < stop; i += {{ lanes }}u) {
            part += x_at(i);
        }
        sum += part;
    }
    let total = reduce(vec4<f32>(sum, 0.0, 0.0, 0.0), lid).x;
    if (wanted < {{ tasks }}u && lid % {{ lanes }}u == 0u) {
        y_put(task, total);
        if (task == {{ tasks - 1 }}u) {
            for (var i = {{ tasks }}u; i < y_stride; i++) {
                y_put(i, 0.0);
            }
        }
    }
}
